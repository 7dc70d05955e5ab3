"""What a process may use of its machine: modules, CPUs, a home folder, locks."""
