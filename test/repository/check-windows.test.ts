import { expect, it } from 'vitest';
import { CLUSTER_BYTES } from '../../src/lib/units.js';
import { RepositoryLab, type Fills } from './repository-lab.js';

it('a sound layer that spans several windows is found sound: one window is planned at a time', async () => {
  await using lab = await RepositoryLab.create();
  const clusters = [0, 1, 2, 100, 4095, 4096, 9000, 19_999];
  const fills: Fills = new Map(clusters.map((cluster, index) => [cluster, index + 1]));
  await lab.commit(fills, { sizeBytes: 20_000 * CLUSTER_BYTES });
  const report = await lab.repository.check({ content: true });
  expect(report.findings).toEqual([]);
  expect(report.bytesVerified).toBe(clusters.length * CLUSTER_BYTES);
});
