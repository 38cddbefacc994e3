"""Floor 2: functions of whole matrices over a mesh; stateless, and private.

`ShardedFunction` applies a function to arrays however they are sharded; `place` plans who computes what;
`execute` runs that plan; `execute_by_hints` needs none; `shardings` holds what is known of a leaf's sharding.
"""
