"""Checkpoints under the official names: one rule table per model, read and written."""
