"""The process that runs a study: searcher, scheduler, session, watchdog, packing, local Ray."""
