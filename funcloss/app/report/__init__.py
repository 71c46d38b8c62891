"""Reports: pages, figures and tables of runs, audits and sweeps."""
