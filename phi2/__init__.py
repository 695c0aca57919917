"""phi2: Microsoft's Phi-2 from scratch, with its own SFT and preference optimisation."""
