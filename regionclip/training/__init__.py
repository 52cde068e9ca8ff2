"""Region-text pretraining, proposal-network and detector training."""
