"""evaluate: how well a trained model does, as numbers that can be compared and that say how much of them is luck."""
