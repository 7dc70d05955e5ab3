"""Jobs on a Ray cluster: submit, jobs, doctor, KubeRay."""
