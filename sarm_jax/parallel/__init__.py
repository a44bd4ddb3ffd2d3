"""Devices, the mesh, several processes, and compilation."""
