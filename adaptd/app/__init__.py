"""The composition root: cluster, buffer, actors, scheduler, HTTP."""
