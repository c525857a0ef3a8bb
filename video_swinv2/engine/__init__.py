"""How steps are computed: plain PyTorch or DeepSpeed behind one surface."""
