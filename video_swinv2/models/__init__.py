"""The models: SwinV2 for images and clips, and SimMIM built on it. Imports torch and no other package of ours."""
