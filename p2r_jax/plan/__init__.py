"""`p2r plan`: what a run needs of accelerators that are not there; see `plan.report`."""
