"""Rents hosts on AWS, prepares them, trains on all of them, and lets them stop by themselves."""
