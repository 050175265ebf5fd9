"""The local cloud: ministack, pinned, in its own process, with our overlay; started and stopped by `launcher`."""
