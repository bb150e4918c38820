"""How work runs on Ray: pipeline, tasks, cluster and what stages share. Knows no stage."""
