/**
 * What the disks of a point are. `application`: the guest's filesystems were frozen, with its own hooks
 * run; `crash`: as after a power failure at that instant; `offline`: the machine was off.
 */
export type Consistency = 'application' | 'crash' | 'offline';
