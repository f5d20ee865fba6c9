"""Many runs from one file, compared in one table (docs/sweep.md).

`file` expands the file, `compare` refuses runs that cannot be compared, `state` reads a run directory, `schedule`
divides the machine and trains, `table`, `tampered` and `examined` collect rows, `study` reads them back with intervals,
`figures`, `study_figures` and `page` show them.
"""
