"""What is to be trained: configurations, experiments, profiles, suspects. Plain arithmetic."""
