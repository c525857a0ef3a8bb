"""How a training step is computed: the plain and DeepSpeed engines, the optimizer, offloading and checkpoints."""
