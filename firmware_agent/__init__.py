"""What runs on the unit: provisioning verbs in factory mode, sensing and alarms in product mode."""

__version__ = "0.1.0"
