"""What runs in Lambda. It ships alone, so it imports nothing of ours from outside."""
