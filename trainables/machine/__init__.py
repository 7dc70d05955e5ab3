"""The parts of the machine that a process may use: modules, CPUs, a home folder, locks."""
