"""``isotrain calibrate``: what the machine at hand achieves, measured, for plans on it."""
