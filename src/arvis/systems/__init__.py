"""Autoregressive visual generation."""
