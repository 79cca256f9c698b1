"""Distillation of a small chat model into a looped one: `speed train distill`. Training only."""
