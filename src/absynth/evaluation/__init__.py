"""Evaluations one can trust: plan, run, ledger, verification, report. Attacks and models are seen as protocols only."""
