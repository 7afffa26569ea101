import type { Engine } from '../../engine/engine.js';
import type { TokenId } from '../../lib/id.js';
import { asId, type Handlers } from '../operation.js';

export function tokenHandlers(engine: Engine): Pick<Handlers, 'createToken' | 'listTokens' | 'revokeToken'> {
  return {
    createToken: async ({ body, actor }) => ({
      status: 201,
      body: await engine.createToken(body.name, actor),
    }),
    listTokens: async () => ({ status: 200, body: { items: await engine.listTokens() } }),
    revokeToken: async ({ params, actor }) => {
      await engine.revokeToken(asId<TokenId>(params.id), actor);
      return { status: 204 };
    },
  };
}
