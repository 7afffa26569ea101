import type { Engine } from '../../engine/engine.js';
import type { Handlers } from '../operation.js';

export function systemHandlers(engine: Engine): Pick<Handlers, 'getHealth' | 'getDoctor'> {
  return {
    // Answered without a token: names and yes or no, never the messages.
    getHealth: async () => {
      const components = (await engine.health()).map(({ name, isHealthy }) => ({ name, isHealthy }));
      const isHealthy = components.every((component) => component.isHealthy);
      return { status: isHealthy ? 200 : 503, body: { isHealthy, components } };
    },
    getDoctor: async () => ({ status: 200, body: { items: await engine.doctor() } }),
  };
}
