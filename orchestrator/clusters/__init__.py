"""Clusters that run steps: processes of this machine, MPI ranks, a simulation. Ray is in actors/."""
