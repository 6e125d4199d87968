"""Generation on many devices and hosts: meshes, sharding rules, resumable batch runs."""
