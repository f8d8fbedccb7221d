"""What is measured: this package and its peers, each as an object that lives in a `Worker`.

A module here has one class for each peer. No module imports another peer's library, so that no
thread pool but its own is in the process.
"""
