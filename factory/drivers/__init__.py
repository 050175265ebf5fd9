"""What moves bytes for the line: media, consoles, shells, power, stimuli. Only `factory.bench` picks from here."""
