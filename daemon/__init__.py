"""The long-running process: configuration, threads, ZeroMQ, and the `inspectord` command."""
