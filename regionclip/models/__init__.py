"""The region encoder and the open-vocabulary detector."""
