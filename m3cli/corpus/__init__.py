"""The corpus room: finds the input, cuts it into shards and reads each as documents; knows no model."""
