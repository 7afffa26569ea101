import { describe, expect, it } from 'vitest';
import { parseCapture, type CaptureOptions } from '../../src/cli/capture-request.js';

const NBD = 'nbd+unix:///vda?socket=/run/x=y.sock';
const base: CaptureOptions = {
  vm: 'web-01',
  repository: 'main',
  disk: [`vda=${NBD}`],
  changeId: ['b2'],
  type: 'auto',
  workers: '4',
  retrySeconds: '120',
};

describe('the command line of the agent', () => {
  it('reads disks from anywhere, with one change id for all', () => {
    const request = parseCapture({
      ...base,
      disk: [`vda=${NBD}`, 'vdb=/dev/vg0/data=1', 'vdc=nbds://user@host:1/a'],
      format: 'raw',
      dirtyContext: ['vda=qemu:dirty-bitmap:nightly@b1', 'vdb=qemu:dirty-bitmap:b0'],
      rate: '100MiB',
    });
    expect(request.disks).toEqual([
      {
        disk: 'vda',
        changeId: 'b2',
        source: { kind: 'nbd', uri: NBD },
        dirty: { context: 'qemu:dirty-bitmap:nightly', since: 'b1' },
      },
      {
        disk: 'vdb',
        changeId: 'b2',
        source: { kind: 'image', path: '/dev/vg0/data=1', format: 'raw', bitmap: 'b0' },
        dirty: { context: 'qemu:dirty-bitmap:b0', since: 'b0' },
      },
      { disk: 'vdc', changeId: 'b2', source: { kind: 'nbd', uri: 'nbds://user@host:1/a' }, dirty: null },
    ]);
    expect(request).toMatchObject({ consistency: 'crash', connections: 4, retryMs: 120_000, tls: {} });
    expect(request).toMatchObject({ bytesPerSecond: 100 * 1024 ** 2, address: null, identity: null });
  });

  it('calls files of a machine that is off offline, and gives each disk its own change id', () => {
    const request = parseCapture({
      ...base,
      disk: ['a=/a.qcow2', 'b=/b.qcow2'],
      changeId: ['a=x', 'b=y=z'],
      format: 'qcow2',
      retrySeconds: '0',
    });
    expect(request.consistency).toBe('offline');
    expect(request.disks.map(({ changeId }) => changeId)).toEqual(['x', 'y=z']);
    expect(request.retryMs).toBe(0);
  });

  it.each<[Partial<CaptureOptions>, object]>([
    [
      { pskUser: 'agent7', tlsPskFile: '/k.psk' },
      { identity: { kind: 'psk', user: 'agent7' }, tls: { pskFile: '/k.psk', username: 'agent7' } },
    ],
    [
      { tlsPskFile: '/k.psk', tlsUsername: 'shared' },
      { identity: null, tls: { pskFile: '/k.psk', username: 'shared' } },
    ],
    [
      { x509Name: 'O=Lab,CN=a', tlsCertificates: '/tls' },
      { identity: { kind: 'x509', distinguishedName: 'O=Lab,CN=a' }, tls: { certificates: '/tls' } },
    ],
    [{ connect: 'nbd://127.0.0.1:20809' }, { address: 'nbd://127.0.0.1:20809' }],
  ])('takes %j', (more, expected) => {
    expect(parseCapture({ ...base, ...more })).toMatchObject(expected);
  });

  it.each<[string, Partial<CaptureOptions>]>([
    ['--change-id for disk vdb is missing', { disk: [`vda=${NBD}`, 'vdb=nbd://h'], changeId: ['vda=x'] }],
    ['--change-id  is not', { changeId: [''] }],
    ['--change-id: there is no --disk vdz', { changeId: ['vdz=x'] }],
    ['--change-id b1 is not', { changeId: ['b1', 'b2'] }],
    ['--change-id: vda is given twice', { changeId: ['vda=1', 'vda=2'] }],
    ['--disk: vda is given twice', { disk: [`vda=${NBD}`, 'vda=/x'] }],
    ['--disk vda is not DISK=SOURCE', { disk: ['vda'] }],
    ['--disk: x.raw must be an NBD URI, or the absolute path', { disk: ['vda=x.raw'], format: 'raw' }],
    ['--format raw or qcow2 must be stated', { disk: ['vda=/x.raw'] }],
    ['--format vmdk', { disk: ['vda=/x.vmdk'], format: 'vmdk' }],
    ['not a usable NBD URI', { disk: ['vda=nbd://user:secret@h/x'] }],
    ['names no change id', { dirtyContext: ['vda=base:allocation'] }],
    ['names no change id', { dirtyContext: ['vda=qemu:dirty-bitmap:'] }],
    ['a file has contexts of the form', { disk: ['vda=/x'], format: 'raw', dirtyContext: ['vda=x:y@1'] }],
    ['--connect is an address', { connect: 'nbd://h/other' }],
    ['not a usable NBD URI', { connect: 'h:1' }],
    ['--workers', { workers: '17' }],
    ['--workers', { workers: '0' }],
    ['--retry-seconds', { retrySeconds: '-1' }],
    ['--type', { type: 'differential' }],
    ['--consistency', { consistency: 'prefer' }],
    ['one of them', { pskUser: 'a', x509Name: 'CN=b' }],
    ['either --tls-certificates or --tls-psk-file', { tlsCertificates: '/a', tlsPskFile: '/b' }],
    ['--tls-psk-file needs --tls-username', { tlsPskFile: '/b' }],
    ['--tls-username goes with --tls-psk-file', { tlsUsername: 'a' }],
    ['must be an absolute path', { tlsCertificates: 'a' }],
  ])('refuses: %s', (words, more) => {
    expect(() => parseCapture({ ...base, ...more })).toThrow(words);
  });

  it('never repeats a secret in a URI', () => {
    const wrong = { ...base, disk: ['vda=nbd://user:secret@h/x'] };
    expect(() => parseCapture(wrong)).toThrow(/^((?!secret).)*$/s);
  });
});
