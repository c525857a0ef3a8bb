"""How steps are computed: the plain and the DeepSpeed engine behind one surface, optimizer, offload and checkpoints."""
