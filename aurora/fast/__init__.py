"""Faster forward passes over the parameters of train_gpt.GPT, and what they need of the device. See README.md."""
