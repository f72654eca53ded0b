"""Which parties this process plays: all of them (`simulated`), or one, with the others in processes of their own.

Start at `party`, what each process does: it joins the others by `greetings`, trains over a `remote_wire`, keeps
`snapshots`, and comes to a `halt` with the others where one is stopped. `launch` starts the processes, and `processes`
watches over them and starts a lost one again. A party that dies is noticed by the `hub`, where its stream ends, and by
a member's end in `streams` where it is the hub itself. What carries the frames: `wiring`, `transports`, `sealing`,
`frame`.
"""
