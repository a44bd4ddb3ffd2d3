"""Devices, meshes, processes and compilation."""
