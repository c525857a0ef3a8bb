"""The model: one SwinV2 for images and clips, and SimMIM around it. Imports torch and nothing else of ours."""
