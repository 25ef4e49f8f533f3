"""Adversarial attacks on any classifier: goals, the paper's suite, exact-gradient attacks, an adapter to Foolbox."""
