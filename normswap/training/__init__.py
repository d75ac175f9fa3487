"""What goes along with a training through a swap: optimizers, checkpoints, parameter groups, running statistics."""
