import { describe, expect, it } from 'vitest';
import { parseDomainStats, vmState } from '../../src/source/libvirt/domain-stats.js';

describe('domstats', () => {
  it('are read domain by domain, and what is not known is left out', () => {
    const stats = parseDomainStats(
      [
        `Domain: 'it's one'`,
        '  state.state=5',
        '  state.reason=6',
        '  block.count=2',
        '  block.0.name=vda',
        '  block.0.path=/a=b',
        '  block.0.capacity=10000384',
        '  block.1.name=hda',
        '',
        `Domain: 'two'`,
        '  state.state=1',
        '  block.0.name=sda',
        '  block.0.physical=8192',
        '  block.0.capacity=junk',
        '  block.7.capacity=1',
        'nonsense',
      ].join('\n'),
    );
    expect(stats).toEqual([
      {
        name: "it's one",
        state: 5,
        reason: 6,
        capacities: new Map([['vda', 10000384]]),
        physical: new Map(),
      },
      { name: 'two', state: 1, reason: 0, capacities: new Map(), physical: new Map([['sda', 8192]]) },
    ]);
  });

  it('say off only of a machine without a QEMU', () => {
    expect([1, 2, 3, 4, 6, 7].map((state) => vmState(state, true))).toEqual([
      'running',
      'running',
      'paused',
      'other',
      'other',
      'other',
    ]);
    expect([5, 6].map((state) => vmState(state, false))).toEqual(['off', 'off']);
  });
});
