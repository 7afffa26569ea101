import { expect, it } from 'vitest';
import { KIB, MIB } from '../../src/lib/units.js';
import { connectNbd } from '../../src/nbd/index.js';
import { serveLocked } from '../../src/nbd/locked-image.js';
import { makeLabDirectory } from '../lab/directory.js';
import { exportRaw, firstDifference, makeRaw, qemuIo } from '../lab/disk-image.js';

it('the lock on a raw image keeps writers out, lets readers in, and hides neither content nor holes', async () => {
  await using lab = await makeLabDirectory();
  const path = lab.file('shared.raw');
  await makeRaw({ path, sizeBytes: 4 * MIB, regions: [{ offset: MIB, length: 64 * KIB }] });
  const options = {
    path,
    format: 'raw',
    connections: 1,
    runtimeDirectory: lab.path,
    owner: 'test',
  } as const;
  await using server = await serveLocked(options);
  await using _second = await serveLocked(options);
  await expect(qemuIo({ path, format: 'raw', commands: ['write 0 512'] })).rejects.toThrow(/another process/);
  await exportRaw(server.uri, 'raw', lab.file('shared.copy'));
  expect(await firstDifference(path, lab.file('shared.copy'))).toBeNull();
  await using handle = await connectNbd(
    { uri: server.uri, metaContexts: ['base:allocation'], connectTimeoutMs: 5000, requestTimeoutMs: 5000 },
    {},
  );
  const { 'base:allocation': extents } = await handle.blockStatus(0, MIB);
  expect([...extents!]).toEqual([MIB, 3]);
});
