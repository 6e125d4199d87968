"""Meshes, sharding rules and resumable batch runs on many devices and hosts."""
