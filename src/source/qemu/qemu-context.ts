import type { HypervisorHost } from '../libvirt/hypervisor-host.js';
import type { QemuVmSource } from '../source.js';
import type { SourceSettings } from '../source-settings.js';
import type { QmpClient } from '../../lib/qmp.js';

/** What every operation on one machine takes. */
export interface QemuContext {
  source: QemuVmSource;
  settings: SourceSettings;
  host: HypervisorHost;
  connect: (signal?: AbortSignal) => Promise<QmpClient>;
}
