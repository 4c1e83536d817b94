"""Preference tuning: DPO, IPO, hinge, ORPO and SimPO."""
