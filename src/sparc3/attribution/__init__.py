"""Attribution: one number per unit, for how much it contributed to the target on the reference samples."""
