"""What is minimised: each objective is plain autograd over log-probabilities of supervised tokens."""
