"""Learns which requests a deeper model answers better, and judges rules beside their baselines."""
