"""Evaluation of trained models: features, probes, likelihoods."""
